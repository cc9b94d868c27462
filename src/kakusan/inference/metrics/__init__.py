r"""Distances between two sample sets, each with its error bar.

Notation: x holds N samples of the law p (usually a model's), y holds M samples of the law q
(usually the test split); a sample of any shape counts as one vector of d numbers. Every metric
returns an `Estimate(value, std_error, n)`; n is the smaller count of the two sides. Arithmetic is
float64 on the CPU (the classifier of `two_sample_test` learns in float32), so that a number does
not depend on the machine the samples were drawn on.

What the numbers can and cannot say:

* `energy_distance`, `mmd` and `kernel_distance` are unbiased: their mean is 0 where p = q, and
  they may then come out negative. They are squares: half the difference is a quarter the number.
* `sliced_wasserstein` and `frechet` are biased upwards at every finite N: two sets of the same law
  are at a positive distance. They mean something only beside a *floor*: the same metric, at the
  same counts, between real data and real data. `compare` gives it.
* `two_sample_test` says how well *this* classifier tells the sets apart; another might do better.
* `precision_recall` sees modes invented or missed, and nothing of the densities within one.
* `nearest_neighbour` sees copies of training points; it cannot see the memorisation of parts.
* Distances on features are blind to what the features ignore: two numbers on different features
  never compare.

The standard error is the spread of `value` over new draws of x, y and the seed, about its own
mean: it contains the sampling noise and not the bias. A value and its floor share y, so their
errors are correlated.

References:
    Sliced and Radon Wasserstein barycenters of measures (Bonneel et al., 2015)
    Central limit theorems for empirical transportation cost (del Barrio & Loubes, 2019)
    Energy statistics: a class of statistics based on distances (Székely & Rizzo, 2013)
    A kernel two-sample test (Gretton et al., 2012)
    The jackknife estimate of variance (Efron & Stein, 1981)
    A general theory for jackknife variance estimation (Shao & Wu, 1989)
    Revisiting classifier two-sample tests (Lopez-Paz & Oquab, 2017)
    Improved precision and recall metric for generative models (Kynkäänniemi et al., 2019)
    GANs trained by a two time-scale update rule (Heusel et al., 2017)
    Demystifying MMD GANs (Bińkowski et al., 2018)
"""

from kakusan.inference.metrics.common import Estimate as Estimate
from kakusan.inference.metrics.common import NearestNeighbour as NearestNeighbour
from kakusan.inference.metrics.common import Row as Row
from kakusan.inference.metrics.comparison import compare as compare
from kakusan.inference.metrics.distances import energy_distance as energy_distance
from kakusan.inference.metrics.distances import frechet as frechet
from kakusan.inference.metrics.distances import kernel_distance as kernel_distance
from kakusan.inference.metrics.distances import mmd as mmd
from kakusan.inference.metrics.distances import sliced_wasserstein as sliced_wasserstein
from kakusan.inference.metrics.neighbours import nearest_neighbour as nearest_neighbour
from kakusan.inference.metrics.neighbours import precision_recall as precision_recall
from kakusan.inference.metrics.neighbours import two_sample_test as two_sample_test
