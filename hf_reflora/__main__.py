"""`python -m hf_reflora` is the command `hf-reflora`."""

from .cli import main


if __name__ == "__main__":
    main()
