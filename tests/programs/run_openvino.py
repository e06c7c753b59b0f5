"""Runs a recipe for OpenVINO on images: python run_openvino.py RECIPE.py IMAGES.npz OUTPUTS.npz.

It needs a process of its own: OpenVINO frees the signal stack that it has set up, so that any
signal would kill the tests.
"""

import pathlib
import sys

import numpy as np

recipe, images, outputs = sys.argv[1:]
names = {}
found = []
for image in np.load(images).values():
    names['image'] = image
    exec(pathlib.Path(recipe).read_text(), names)
    found.append(names['scores'])
np.savez(outputs, *found)
