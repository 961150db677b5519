"""What train.py and evaluate.py share.

    settings.py      Config <-> command line; model files and their contract
    runs.py          a run's folder: lock, state, log, resume; building a model, opening a run again
    pretraining.py   --pretrain_data, --cold_start, --init
    comparison.py    finished runs -> one table, with paired differences
    new_items.py     items that a model was not trained on
    report.py        pages: a run, two runs, recommendations; draws what it is given
"""
