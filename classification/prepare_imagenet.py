"""ImageNet to LMDB: python -m classification.prepare_imagenet --help     (the command of classification/imagenet/)"""

from classification.imagenet.prepare import main
from engine.errors import run_main

if __name__ == "__main__":
    run_main(main)
