"""Kaggle: from a config to a score on the leaderboard, rehearsed offline first.

In the order of reading; each imports only from those before it:

    image          what Kaggle's image has, and what wheels would change in it
    bundle         wheels, weights and notebook, built, and the manifest of them
    check          every rule that they must keep, looked up before anything is sent
    image_env      an environment that stands for the image
    sandbox        no network, Kaggle's folders, bounds of time and memory
    run_notebook   executes a notebook, cell after cell
    rehearsal      the dry run: the notebook in the sandbox, and its submission checked
    retry          requests that fail, and files on their way
    kaggle_client  the calls to Kaggle, each of which did what it says, or raises
    push           datasets, notebook, run, output, submission, score: step by step
    submit         `bin/submit`
"""
