"""The tasks by name; nothing is imported before it is asked for."""

#: name to (module, one line).
EMBEDDED = {
    "pycode": ("thalweg.recipes.pycode", "a small GPT on the source code of Python's standard library"),
    "digits": ("thalweg.recipes.digits", "a convolutional net on scikit-learn's handwritten digits"),
}

#: likewise, of tasks whose data lie in a folder that is named by ``--data`` or the environment variable THALWEG_DATA.
FROM_FOLDER = {
    "characters": ("thalweg.recipes.characters", "a small GPT on tiny-shakespeare, by characters"),
    "fashion_mnist": ("thalweg.recipes.fashion_mnist", "a small net on Fashion-MNIST, for three epochs"),
    "cifar10": ("thalweg.recipes.cifar10", "airbench94's net and schedule on CIFAR-10"),
    "california": ("thalweg.recipes.california", "a perceptron on California's housing (20,640 rows)"),
    "adult": ("thalweg.recipes.adult", "a perceptron on UCI's census income (48,842 rows)"),
    "sst2": ("thalweg.recipes.sst2", "a pre-trained encoder, fine-tuned to tell praise from blame in 9,613 sentences"),
}

SHIPPED = {**EMBEDDED, **FROM_FOLDER}
