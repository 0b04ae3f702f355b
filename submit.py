"""python submit.py checkpoint=RUN [challenges=FILE] [solutions=FILE] [key=value ...]; --help."""

from tiny_onn.cli import submit

if __name__ == "__main__":
    submit()
