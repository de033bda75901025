"""`bin/show`: the code is in `solving/`."""

if __name__ == "__main__":
    from .command import run_main
    from .solving.show import main

    run_main(main)
