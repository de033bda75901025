"""`bin/score`: the code is in `answers/`."""

if __name__ == "__main__":
    from .answers.submission import main
    from .command import run_main

    run_main(main)
