"""Questions about training and solving, answered by repeated runs with confidence intervals.

In the order of reading; each imports only from those before it:

    study     what a study asks: its file, its arms, its metrics
    verdict   spreads, differences with intervals, verdicts, power laws
    runs      a run: train, solve, measure; what is done stays done
    outcome   results of runs -> what is known of each arm
    schedule  which run is next, and where runs are done
    page      docs/studies/NAME.md, with its pictures
    command   `bin/study`
"""
