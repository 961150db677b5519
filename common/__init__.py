"""What lies below everything else, one subject a file. Nothing here imports the rest.

    files.py      errors, safe writes, JSON and safetensors, the lock on a folder, the device
    features.py   the feature file: where it lies, written, read and checked
    tables.py     what a data source needs: what it reads, clean text, a reader of tables
    pictures.py   opening strangers' pictures
    web.py        fetching files and pictures
    encoders.py   sentences and pictures -> vectors
"""
