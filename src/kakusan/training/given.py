"""What a caller of `fit` gave: a name, a path, a tensor, an array or a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kakusan.errors import UsageError
from kakusan.training.config import Config, configure
from kakusan.training.data import Codec, Data, as_data, load

ARRAY = "array"  # what a configuration names data that came as a tensor or array
Array = Tensor | np.ndarray


def of_array(
    config: Config, array: Array, labels: Any, index: Tensor | None, codec: Codec | None
) -> Data:
    """An array, split and encoded as the configuration says, or as a run did before."""
    share = config.data.test_fraction
    return as_data(
        array, labels, test_fraction=share, seed=config.seed, test_index=index, codec=codec
    )


def wanted(source: Any, labels: Any, options: dict[str, Any]) -> tuple[Config, Array | None]:
    """The configuration and, where the data came as one, the array."""
    if isinstance(source, Config):
        if options:
            raise UsageError(f"a Config leaves no room for {', '.join(options)}; put them into it")
        return source, None
    if isinstance(source, (str, Path)):
        name, array = str(source), None
    elif isinstance(source, Array):
        name, array = ARRAY, source
    else:
        raise UsageError(
            f"fit learns from a name, a path, a tensor, an array or a Config, not from "
            f"{type(source).__name__}; torch.as_tensor(...) makes a tensor of it"
        )
    if labels is not None and array is None:
        raise UsageError(f"labels go with a tensor or array; for {name} set data.labels")
    config = configure(base=options)
    given = config.data.model_fields_set - {"test_fraction", "dequantise"}
    if array is not None and given:
        raise UsageError(f"data.{min(given)} does not apply to a tensor or array")
    section = config.data.model_copy(update={"source": name})
    return config.model_copy(update={"data": section}), array


def again(config: Config, data: Array | str | None, index: Tensor | None, codec: Codec) -> Data:
    """The data of a run, split and encoded as they were in training.

    Arguments:
        config: That of the run.
        data: Where they are now, if they have moved, or the array again.
        index: The numbers of the samples that were held out, where known.
        codec: That of the run.
    """
    if isinstance(data, Array):
        return of_array(config, data, None, index, codec)
    section = config.data
    if data is not None:
        section = section.model_copy(update={"source": str(data)})
    if section.source == ARRAY:
        raise UsageError(
            "this model was trained on an array, which no run folder keeps; give it again as "
            "evaluate(data=...), or as model.data = model.data_of_run(array)"
        )
    return load(section, config.seed, index, codec)
