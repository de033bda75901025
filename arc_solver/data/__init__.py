"""Where training samples come from, and what may not be among them.

In the order of reading; each imports only from those before it:

    counting  generated tasks about number
    sources   task files, many-sample files, live RE-ARC, counting tasks
    leaks     the leak audit: trained on and scored on, by id and by content
    corpus    the mixture of sources, and what is held out of it
    stream    samples without end: drawn, augmented, encoded, packed

The rest is `bin/data`:

    generate    files of generated tasks: RE-ARC, ARC-GEN
    download    a file from the web over connections that break
    published   public sets: which there are, and how they get here
    statistics  what a set is like
    command     the words of `bin/data`

What other folders use is handed on here, but for `stream`, which needs PyTorch: `bin/submit` starts without it.
"""

from .leaks import DATA_FILE, NOTHING, TrainingData, leak_audit, read_training_data

__all__ = ["DATA_FILE", "NOTHING", "TrainingData", "leak_audit", "read_training_data"]
