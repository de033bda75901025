"""The main job: adapt, predict and vote for every task before the deadline.

In the order of reading; each imports only from those before it:

    adapt        test-time training on a task's own pairs, many tasks at once; its AdamW
    predict      ask under many views, undo each answer, score what may win in all
    preflight    one short task through all of it, before the first real one
    executors    where jobs run: here, in processes, on Ray
    worker       what a job is, and who does it
    run_config   the config of a run, kept and compared
    joint        before that, one model for all tasks of the run
    journal      the run directory: kept whole, continued after a kill
    budget       how long a job may take
    scheduler    which job is next, and what follows from failures
    status       how a run stands; `bin/solve --status`
    reliability  how right a run's chances were; `bin/solve --reliability`
    solve        all of it, for every task
    show         `bin/show`: tasks and answers as pictures
    command      `bin/solve`: what its words ask for
"""
