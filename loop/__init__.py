"""What train.py and evaluate.py share.

    settings.py      Config <-> command line; model files and their contract
    runs.py          a run's folder: lock, state, log, resume; building a model, opening a run again
    pretraining.py   --pretrain_data, --cold_start, --init
    report.py        report.html: draws what it is given
"""
