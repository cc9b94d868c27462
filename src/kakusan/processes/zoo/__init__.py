"""A zoo of processes with known laws: what they are is written down, and each law is tested.

Every one has a `start`; those whose laws are known in closed form say so by having the method:

================================  ==============================================================
``moments(x0, t)``                mean and covariance of X_t given X_0 = x0, as `Moments`
``log_transition(x, x0, t)``      log p(X_t = x | X_0 = x0), with shape (B,)
``score_from(x0)``                the field (x, t) -> ∇log p(X_t = x | X_0 = x0)
``log_stationary(x)``             the logarithm of the stationary density, with shape (B,)
``exact``                         draws from the transition (`KnownTransition`)
``flow``, ``kick``                the two halves of a splitting (`Splittable`)
================================  ==============================================================

Times are elapsed times, numbers or tensors of shape () or (B,).
"""

from kakusan.processes.zoo.biology import CellModel as CellModel
from kakusan.processes.zoo.biology import FitzHughNagumo as FitzHughNagumo
from kakusan.processes.zoo.finance import GeometricBrownian as GeometricBrownian
from kakusan.processes.zoo.finance import Heston as Heston
from kakusan.processes.zoo.gaussian import Brownian as Brownian
from kakusan.processes.zoo.gaussian import CriticallyDamped as CriticallyDamped
from kakusan.processes.zoo.gaussian import OrnsteinUhlenbeck as OrnsteinUhlenbeck
from kakusan.processes.zoo.laws import Moments as Moments
from kakusan.processes.zoo.mechanics import DoubleWell as DoubleWell
from kakusan.processes.zoo.mechanics import Langevin as Langevin
from kakusan.processes.zoo.mechanics import Lorenz as Lorenz
from kakusan.processes.zoo.mechanics import Underdamped as Underdamped
from kakusan.processes.zoo.pearson import CIR as CIR
from kakusan.processes.zoo.pearson import Jacobi as Jacobi
from kakusan.processes.zoo.shapes import Landmarks as Landmarks
from kakusan.processes.zoo.shapes import Swirl as Swirl
