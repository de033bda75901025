"""`bin/solve`: the code is in `solving/`."""

if __name__ == "__main__":
    from .command import run_main
    from .solving.command import main

    run_main(main)
