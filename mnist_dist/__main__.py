"""`python -m mnist_dist`: what torchrun and `accelerate launch` start."""

from mnist_dist.cli import main

if __name__ == "__main__":
    main()
