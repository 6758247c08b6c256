"""COVID-CT-Mask-Net on stock torchvision: phantoms, Mask R-CNN, ranked boxes and the module S.

The package is read in the order in which data flow: `datasets` -> `models` -> `metrics` ->
`training` -> `plotting`. Importing it loads nothing but this file.
"""

import os

# While one of torch's threads waits for the others it would spin, on a core which that other thread
# may need. Two programs on two cores then slow each other to a fifth (ResNet-18, a training step);
# resting threads leave each a half. The price is about 30 % of the speed where a program is
# alone: OMP_WAIT_POLICY=active, set before, buys it back. OpenMP reads this once, with torch; a
# program that has imported torch before keeps spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
