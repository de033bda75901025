"""`bin/submit`: the code is in `release/`."""

if __name__ == "__main__":
    from .command import run_main
    from .release.submit import main

    run_main(main)
