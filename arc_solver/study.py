"""`bin/study`: the code is in `studies/`."""

if __name__ == "__main__":
    from .command import run_main
    from .studies.command import main

    run_main(main)
