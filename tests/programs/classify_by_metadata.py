"""Follows the recipe for metadata, and labels images by what is in the file that it writes.

classify_by_metadata.py RECIPE MODEL IMAGE ... prints the best label and its score, per image.
"""

import sys

recipe, model, *images = sys.argv[1:]
exec(recipe)  # before the import: it loads the library that this needs

from tflite_support.task import vision  # noqa: E402

classifier = vision.ImageClassifier.create_from_file(model)
for path in images:
    result = classifier.classify(vision.TensorImage.create_from_file(path))
    best = result.classifications[0].categories[0]
    print(best.category_name, best.score)
