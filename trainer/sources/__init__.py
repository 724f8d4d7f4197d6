"""Image-text data in any of the field's formats, as the rows of a manifest. Nothing here loads torch.

source.py      what a recipe names: a path, a format, a split, a weight
detect.py      the format of a path, told by its content
json_files.py  COCO captions, Karpathy splits, VQAv2 pairs, LAVIS and LLaVA records
flickr30k.py   Flickr30k's results files
tars.py        webdataset shards
arrow.py       Hugging Face datasets folders, Arrow and Parquet files
convert.py     any format → a manifest in the cache, written once
rows.py        a manifest of any length as a sequence, parsed on demand
mixture.py     several of them as one
"""
