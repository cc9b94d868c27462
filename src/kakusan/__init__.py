"""kakusan (拡散, "diffusion"): diffusion models as stochastic differential equations.

Everything public is importable from here; heavy rooms open when they are first entered, so that
`import kakusan` stays as light as torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kakusan.core import grids as grids

# floor 0: core
from kakusan.core.calculus import gram_divergence as gram_divergence
from kakusan.core.calculus import probed_gram_divergence as probed_gram_divergence
from kakusan.core.counter import Counter as Counter
from kakusan.core.counter import CounterWithArea as CounterWithArea
from kakusan.core.noise import Fresh as Fresh
from kakusan.core.noise import Keyed as Keyed
from kakusan.core.noise import Recorded as Recorded
from kakusan.core.operators import Dense as Dense
from kakusan.core.operators import Diagonal as Diagonal
from kakusan.core.operators import NotElliptic as NotElliptic
from kakusan.core.operators import Operator as Operator
from kakusan.core.operators import Scale as Scale
from kakusan.core.operators import Zero as Zero
from kakusan.errors import KakusanError as KakusanError
from kakusan.errors import UsageError as UsageError

# floor 3: models
from kakusan.models.denoiser import Denoiser as Denoiser
from kakusan.models.nets.mlp import MLP as MLP
from kakusan.models.nets.unet import UNet as UNet
from kakusan.models.score import ExactEmpirical as ExactEmpirical
from kakusan.models.score import ExactMixture as ExactMixture

# floor 3: objectives
from kakusan.objectives.matching import SNR as SNR
from kakusan.objectives.matching import Denoising as Denoising
from kakusan.objectives.matching import Importance as Importance
from kakusan.objectives.matching import Karras as Karras
from kakusan.objectives.matching import Likelihood as Likelihood
from kakusan.objectives.matching import LogNormal as LogNormal
from kakusan.objectives.matching import Stratified as Stratified
from kakusan.objectives.matching import Uniform as Uniform
from kakusan.objectives.matching import UniformTimes as UniformTimes

# floor 1: processes
from kakusan.processes import betas as betas
from kakusan.processes.linear import DDPM as DDPM
from kakusan.processes.linear import EDM as EDM
from kakusan.processes.linear import VE as VE
from kakusan.processes.linear import VP as VP
from kakusan.processes.linear import Cosine as Cosine
from kakusan.processes.linear import LinearSDE as LinearSDE
from kakusan.processes.linear import Rectified as Rectified
from kakusan.processes.linear import SubVP as SubVP
from kakusan.processes.linear import angle_grid as angle_grid
from kakusan.processes.linear import log_snr_grid as log_snr_grid
from kakusan.processes.sde import SDE as SDE
from kakusan.processes.sde import KnownTransition as KnownTransition
from kakusan.processes.sde import Splittable as Splittable
from kakusan.processes.transforms import Stratonovich as Stratonovich
from kakusan.processes.transforms import ito as ito
from kakusan.processes.transforms import probability_flow as probability_flow
from kakusan.processes.transforms import reverse as reverse
from kakusan.processes.transforms import stratonovich as stratonovich
from kakusan.processes.transforms import tilt as tilt
from kakusan.processes.zoo import CIR as CIR
from kakusan.processes.zoo import Brownian as Brownian
from kakusan.processes.zoo import CellModel as CellModel
from kakusan.processes.zoo import CriticallyDamped as CriticallyDamped
from kakusan.processes.zoo import DoubleWell as DoubleWell
from kakusan.processes.zoo import FitzHughNagumo as FitzHughNagumo
from kakusan.processes.zoo import GeometricBrownian as GeometricBrownian
from kakusan.processes.zoo import Heston as Heston
from kakusan.processes.zoo import Jacobi as Jacobi
from kakusan.processes.zoo import Landmarks as Landmarks
from kakusan.processes.zoo import Langevin as Langevin
from kakusan.processes.zoo import Lorenz as Lorenz
from kakusan.processes.zoo import OrnsteinUhlenbeck as OrnsteinUhlenbeck
from kakusan.processes.zoo import Swirl as Swirl
from kakusan.processes.zoo import Underdamped as Underdamped

# floor 2: solvers
from kakusan.solvers.adaptive import Bisection as Bisection
from kakusan.solvers.adaptive import DormandPrince as DormandPrince
from kakusan.solvers.adaptive import Tally as Tally
from kakusan.solvers.adjoint import Adjoint as Adjoint
from kakusan.solvers.compiled import Compiled as Compiled
from kakusan.solvers.exponential import Ancestral as Ancestral
from kakusan.solvers.exponential import Multistep as Multistep
from kakusan.solvers.exponential import generate as generate
from kakusan.solvers.forms import NoiseForm as NoiseForm
from kakusan.solvers.forms import noise_form as noise_form
from kakusan.solvers.methods import RK4 as RK4
from kakusan.solvers.methods import Exact as Exact
from kakusan.solvers.methods import Heun as Heun
from kakusan.solvers.methods import Splitting as Splitting
from kakusan.solvers.methods import TamedEuler as TamedEuler
from kakusan.solvers.solve import Eager as Eager
from kakusan.solvers.solve import Engine as Engine
from kakusan.solvers.solve import EulerMaruyama as EulerMaruyama
from kakusan.solvers.solve import Method as Method
from kakusan.solvers.solve import Path as Path
from kakusan.solvers.solve import solve as solve
from kakusan.solvers.strong import SRK as SRK
from kakusan.solvers.strong import Milstein as Milstein
from kakusan.solvers.strong import StratonovichHeun as StratonovichHeun
from kakusan.solvers.weak import WeakSecond as WeakSecond

if TYPE_CHECKING:
    from kakusan.bridges import Bridge as Bridge
    from kakusan.bridges import learn_bridge as learn_bridge
    from kakusan.bridges.files import load_bridge as load_bridge
    from kakusan.bridges.files import save_bridge as save_bridge
    from kakusan.certification import Certificate as Certificate
    from kakusan.certification import certify as certify
    from kakusan.condition_files import load_condition as load_condition
    from kakusan.condition_files import save_condition as save_condition
    from kakusan.core.bits import bits_per_dim as bits_per_dim
    from kakusan.core.trace import ExactTrace as ExactTrace
    from kakusan.core.trace import Hutchinson as Hutchinson
    from kakusan.core.trace import HutchPlusPlus as HutchPlusPlus
    from kakusan.core.trace import Normals as Normals
    from kakusan.core.trace import Orthogonal as Orthogonal
    from kakusan.core.trace import Signs as Signs
    from kakusan.inference.conditioning.ahead import Linearised as Linearised
    from kakusan.inference.conditioning.finish import Free as Free
    from kakusan.inference.conditioning.finish import ModifiedBridge as ModifiedBridge
    from kakusan.inference.conditioning.finish import Pinned as Pinned
    from kakusan.inference.conditioning.linear import LinearTilt as LinearTilt
    from kakusan.inference.conditioning.metropolis import metropolis as metropolis
    from kakusan.inference.conditioning.paths import conditioned as conditioned
    from kakusan.inference.conditioning.pull import Pull as Pull
    from kakusan.inference.conditioning.tilts import Tilt as Tilt
    from kakusan.inference.guidance import DPS as DPS
    from kakusan.inference.guidance import Classifier as Classifier
    from kakusan.inference.guidance import MomentMatching as MomentMatching
    from kakusan.inference.guidance import PiGDM as PiGDM
    from kakusan.inference.guidance import Twisted as Twisted
    from kakusan.inference.guidance.learned import Denoised as Denoised
    from kakusan.inference.guidance.learned import PathNoise as PathNoise
    from kakusan.inference.likelihood import LogProb as LogProb
    from kakusan.inference.likelihood import decode as decode
    from kakusan.inference.likelihood import encode as encode
    from kakusan.inference.likelihood import interpolate as interpolate
    from kakusan.inference.likelihood import log_prob as log_prob
    from kakusan.inference.weights import effective_sample_size as effective_sample_size
    from kakusan.inference.weights import log_mean_exp as log_mean_exp
    from kakusan.inference.weights import path_log_weights as path_log_weights
    from kakusan.learn import learn_score as learn_score
    from kakusan.learned_conditions import Learned as Learned
    from kakusan.learned_conditions import LearnedCondition as LearnedCondition
    from kakusan.learned_conditions import learn_condition as learn_condition
    from kakusan.models.energy import Energy as Energy
    from kakusan.objectives.chain import Analytic as Analytic
    from kakusan.objectives.chain import Chain as Chain
    from kakusan.objectives.chain import Interpolated as Interpolated
    from kakusan.objectives.chain import Large as Large
    from kakusan.objectives.chain import Small as Small
    from kakusan.objectives.covering import Covering as Covering
    from kakusan.objectives.covering import Matched as Matched
    from kakusan.objectives.decoders import DiscretisedGaussian as DiscretisedGaussian
    from kakusan.objectives.decoders import GaussianDecoder as GaussianDecoder
    from kakusan.objectives.elbo import Bound as Bound
    from kakusan.objectives.elbo import bound as bound
    from kakusan.objectives.elbo import continuous_bound as continuous_bound
    from kakusan.objectives.local import Local as Local
    from kakusan.objectives.local import Skorokhod as Skorokhod
    from kakusan.objectives.malliavin import Average as Average
    from kakusan.objectives.malliavin import Bootstrapped as Bootstrapped
    from kakusan.objectives.malliavin import First as First
    from kakusan.objectives.malliavin import Last as Last
    from kakusan.objectives.malliavin import Weighted as Weighted
    from kakusan.objectives.malliavin import Window as Window
    from kakusan.objectives.score_matching import Clean as Clean
    from kakusan.objectives.score_matching import DenoisingAt as DenoisingAt
    from kakusan.objectives.score_matching import Explicit as Explicit
    from kakusan.objectives.score_matching import FlowMatching as FlowMatching
    from kakusan.objectives.score_matching import Implicit as Implicit
    from kakusan.objectives.score_matching import OverTime as OverTime
    from kakusan.objectives.score_matching import Sliced as Sliced
    from kakusan.objectives.variational import Hybrid as Hybrid
    from kakusan.objectives.variational import Simple as Simple
    from kakusan.objectives.variational import Variational as Variational
    from kakusan.pipeline import DiffusionModel as DiffusionModel
    from kakusan.processes.betas import LearnedSchedule as LearnedSchedule
    from kakusan.processes.flow import AngularFlow as AngularFlow
    from kakusan.processes.observations import Coordinates as Coordinates
    from kakusan.processes.observations import Event as Event
    from kakusan.processes.observations import Label as Label
    from kakusan.processes.observations import Measured as Measured
    from kakusan.processes.observations import Observation as Observation
    from kakusan.processes.observations import Series as Series
    from kakusan.processes.observations import Terminal as Terminal
    from kakusan.solvers.corrector import NoiseLevel as NoiseLevel
    from kakusan.solvers.corrector import PredictorCorrector as PredictorCorrector
    from kakusan.solvers.corrector import SignalToNoise as SignalToNoise
    from kakusan.solvers.corrector import annealed_langevin as annealed_langevin
    from kakusan.solvers.gaussian import AncestralSteps as AncestralSteps
    from kakusan.solvers.gaussian import EulerSteps as EulerSteps
    from kakusan.solvers.langevin import BAOAB as BAOAB
    from kakusan.solvers.langevin import MALA as MALA
    from kakusan.solvers.langevin import Acceptance as Acceptance
    from kakusan.solvers.langevin import kinetic_langevin as kinetic_langevin
    from kakusan.solvers.langevin import langevin as langevin
    from kakusan.solvers.multilevel import Expectation as Expectation
    from kakusan.solvers.multilevel import expectation as expectation
    from kakusan.solvers.rosenbrock import RosenbrockSteps as RosenbrockSteps
    from kakusan.training.config import Config as Config

__version__ = "0.1.0"

# rooms that need more than torch, or that not everybody enters: opened by name
_ROOMS = {
    "learn_condition": "kakusan.learned_conditions",
    "Learned": "kakusan.learned_conditions",
    "LearnedCondition": "kakusan.learned_conditions",
    "load_condition": "kakusan.condition_files",
    "save_condition": "kakusan.condition_files",
    "Denoised": "kakusan.inference.guidance.learned",
    "PathNoise": "kakusan.inference.guidance.learned",
    "Linearised": "kakusan.inference.conditioning.ahead",
    "Bridge": "kakusan.bridges",
    "learn_bridge": "kakusan.bridges",
    "load_bridge": "kakusan.bridges.files",
    "save_bridge": "kakusan.bridges.files",
    "Free": "kakusan.inference.conditioning.finish",
    "ModifiedBridge": "kakusan.inference.conditioning.finish",
    "Pinned": "kakusan.inference.conditioning.finish",
    "LinearTilt": "kakusan.inference.conditioning.linear",
    "metropolis": "kakusan.inference.conditioning.metropolis",
    "conditioned": "kakusan.inference.conditioning.paths",
    "Pull": "kakusan.inference.conditioning.pull",
    "Tilt": "kakusan.inference.conditioning.tilts",
    "DPS": "kakusan.inference.guidance",
    "Classifier": "kakusan.inference.guidance",
    "MomentMatching": "kakusan.inference.guidance",
    "PiGDM": "kakusan.inference.guidance",
    "Twisted": "kakusan.inference.guidance",
    "Covering": "kakusan.objectives.covering",
    "Matched": "kakusan.objectives.covering",
    "Average": "kakusan.objectives.malliavin",
    "Bootstrapped": "kakusan.objectives.malliavin",
    "First": "kakusan.objectives.malliavin",
    "Last": "kakusan.objectives.malliavin",
    "Weighted": "kakusan.objectives.malliavin",
    "Window": "kakusan.objectives.malliavin",
    "Coordinates": "kakusan.processes.observations",
    "Event": "kakusan.processes.observations",
    "Label": "kakusan.processes.observations",
    "Measured": "kakusan.processes.observations",
    "Observation": "kakusan.processes.observations",
    "Series": "kakusan.processes.observations",
    "Terminal": "kakusan.processes.observations",
    "AncestralSteps": "kakusan.solvers.gaussian",
    "EulerSteps": "kakusan.solvers.gaussian",
    "RosenbrockSteps": "kakusan.solvers.rosenbrock",
    "DiffusionModel": "kakusan.pipeline",
    "Config": "kakusan.training.config",
    "certify": "kakusan.certification",
    "Certificate": "kakusan.certification",
    "learn_score": "kakusan.learn",
    "Local": "kakusan.objectives.local",
    "Skorokhod": "kakusan.objectives.local",
    "bits_per_dim": "kakusan.core.bits",
    "ExactTrace": "kakusan.core.trace",
    "Hutchinson": "kakusan.core.trace",
    "HutchPlusPlus": "kakusan.core.trace",
    "Normals": "kakusan.core.trace",
    "Orthogonal": "kakusan.core.trace",
    "Signs": "kakusan.core.trace",
    "LogProb": "kakusan.inference.likelihood",
    "decode": "kakusan.inference.likelihood",
    "encode": "kakusan.inference.likelihood",
    "interpolate": "kakusan.inference.likelihood",
    "log_prob": "kakusan.inference.likelihood",
    "effective_sample_size": "kakusan.inference.weights",
    "log_mean_exp": "kakusan.inference.weights",
    "path_log_weights": "kakusan.inference.weights",
    "Energy": "kakusan.models.energy",
    "Analytic": "kakusan.objectives.chain",
    "Chain": "kakusan.objectives.chain",
    "Interpolated": "kakusan.objectives.chain",
    "Large": "kakusan.objectives.chain",
    "Small": "kakusan.objectives.chain",
    "DiscretisedGaussian": "kakusan.objectives.decoders",
    "GaussianDecoder": "kakusan.objectives.decoders",
    "Bound": "kakusan.objectives.elbo",
    "bound": "kakusan.objectives.elbo",
    "continuous_bound": "kakusan.objectives.elbo",
    "Clean": "kakusan.objectives.score_matching",
    "DenoisingAt": "kakusan.objectives.score_matching",
    "Explicit": "kakusan.objectives.score_matching",
    "FlowMatching": "kakusan.objectives.score_matching",
    "Implicit": "kakusan.objectives.score_matching",
    "OverTime": "kakusan.objectives.score_matching",
    "Sliced": "kakusan.objectives.score_matching",
    "Hybrid": "kakusan.objectives.variational",
    "Simple": "kakusan.objectives.variational",
    "Variational": "kakusan.objectives.variational",
    "LearnedSchedule": "kakusan.processes.betas",
    "AngularFlow": "kakusan.processes.flow",
    "NoiseLevel": "kakusan.solvers.corrector",
    "PredictorCorrector": "kakusan.solvers.corrector",
    "SignalToNoise": "kakusan.solvers.corrector",
    "annealed_langevin": "kakusan.solvers.corrector",
    "BAOAB": "kakusan.solvers.langevin",
    "MALA": "kakusan.solvers.langevin",
    "Acceptance": "kakusan.solvers.langevin",
    "kinetic_langevin": "kakusan.solvers.langevin",
    "langevin": "kakusan.solvers.langevin",
    "Expectation": "kakusan.solvers.multilevel",
    "expectation": "kakusan.solvers.multilevel",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(_ROOMS[name]), name)
    raise AttributeError(f"kakusan has no {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
