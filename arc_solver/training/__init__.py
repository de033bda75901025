"""The offline run: from sources and a model to trained weights and their card.

In the order of reading; each imports only from those before it:

    muon         the optimizer of hidden matrices, where bfloat16 is slow
    optimize     the offline loop, optimizers, and the schedules of both
    parallel     processes, shards, precision, compilation
    memory       what memory a step takes
    checkpoints  complete or absent; the last good one is never in danger
    validate     loss and generated answers on held-out tasks
    log          `log.jsonl`, TensorBoard, the progress bar
    run          what the parts of a run share, and how one starts
    card         the README beside the weights
    report       what a run says before it begins, and leaves at its end
    train        stages of training, one after another
    command      `bin/train`: what its words ask for

Nothing is handed on here: it would need PyTorch, and `bin/train` understands its words before importing that.
"""
