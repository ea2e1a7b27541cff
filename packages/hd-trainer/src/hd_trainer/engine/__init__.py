"""What trains: loop, optimiser, average, checkpoints, precision, draws. It knows tensors and modules, no stage and no data set."""
