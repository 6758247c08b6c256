"""COVID-CT-Mask-Net on stock torchvision: phantoms, Mask R-CNN, ranked boxes and the module S.

The package is read in the order in which data flows: `data` -> `models` -> `training` ->
`metrics` -> `plotting`. Importing it loads nothing but this file.
"""

__version__ = "0.1.0"
