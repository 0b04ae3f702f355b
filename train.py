"""python train.py stage=pretrain [preset=nano|small|base] [key=value ...]; --help lists all."""

from tiny_onn.cli import train

if __name__ == "__main__":
    train()
