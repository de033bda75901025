"""Speed, ours beside a baseline, measured in one run on the machine in hand.

In the order of reading; each imports only from those before it:

    baseline_training  LoRA with TRL's SFTTrainer and PEFT
    baseline_solving   test-time training and `generate` with PEFT
    solving            our test time beside it
    training           our offline trainer beside TRL's
    adaptation         adaptation alone beside PEFT's, and where its time goes
    schedule           what a task costs besides solving it
    precision          bf16 beside fp32
    memory             what a step of adaptation takes, beside the estimate
    bench              the table of each; `bin/bench`
"""
