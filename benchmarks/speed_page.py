"""placeholder"""


def write(root):
    raise NotImplementedError
