"""Guidance: drawing from a diffusion model given a measurement, a class or an event.

======================  ====================================  =================================
kind                    p(x_0 | x_t) taken as                 follows
======================  ====================================  =================================
``DPS``                 a point                               linear measurements
``PiGDM``               N(x̂_0, r_t² I)                        linear measurements
``MomentMatching``      N(x̂_0, V), V of the denoiser          linear measurements
``Classifier``          a point                               any likelihood with a slope
``Twisted``             any of these, corrected by particles  any likelihood
``ShiftTilt``           learned from paths of the model       anything that can be drawn
======================  ====================================  =================================
"""

from kakusan.inference.guidance.classifier import Classifier as Classifier
from kakusan.inference.guidance.common import Guidance as Guidance
from kakusan.inference.guidance.common import Guided as Guided
from kakusan.inference.guidance.common import Prior as Prior
from kakusan.inference.guidance.dps import DPS as DPS
from kakusan.inference.guidance.moments import MomentMatching as MomentMatching
from kakusan.inference.guidance.pigdm import PiGDM as PiGDM
from kakusan.inference.guidance.twisted import Particles as Particles
from kakusan.inference.guidance.twisted import Twisted as Twisted
