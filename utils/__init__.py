"""What training and evaluation need and no method, network or data set is named in; imports none of those packages.

parser, flags   every command line's parser, and kinds of flags; the flags of optimisation and run
errors          errors as one line; signals that end a run
machine         random seeds; what the hardware can do; the facts about it that a run records
files           atomic writes of JSON and arrays; knows no format
checkpoint      the format of a run's checkpoint: written, verified, loaded
run_directory   who may write to a run's directory, where a run starts, what is saved (README.md: every file and key)
resume, exports     may a run go on; a run's record -> the JSON files, the final table; both without touching a file
records         what a run is, as types; METRICS, the table of metrics' names and units; needs no PyTorch
engine          one epoch of training, one pass of validation, the optimiser and its schedule
metrics         the metrics' formulas
calibration     temperatures, and what early exit saves, from logits
logger          an epoch's record -> console, log file, TensorBoard
launch          this process's rank among how many; needs no PyTorch, as parser, errors and records need none
distributed     what several processes do together
compile, cuda_graph     a compiled network and objective; a captured training step
"""
