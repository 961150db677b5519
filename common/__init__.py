"""What lies below everything else, one subject a file. Nothing here imports the rest.

    files.py          errors, safe writes, JSON and safetensors, the lock on a folder, the device
    features.py       the feature file: where it lies, written, read and checked
    tables.py         what a data source needs: what it reads, clean text, a reader of tables
    times.py          times as files write them -> seconds
    interactions.py   who bought what when, from tables whose columns have usual names
    items.py          what is known of items, from objects and tables with usual names
    splits.py         where training ends, and which items are targets
    vectors.py        vectors of somebody's own
    pictures.py       opening strangers' pictures
    web.py            fetching files and pictures
    encoders.py       sentences and pictures -> vectors
    progress.py       a bar, and lines where there is no terminal
"""
