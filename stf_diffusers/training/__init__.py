"""The parts of a training script, each usable alone; `examples/train_unconditional_stf.py` puts them together.

In the order in which a script uses them: `command_line`, `launch` and `run_lock` begin a run; `data_set`, `image_data`,
`streaming`, `autoencoder` and `latents` read the images; `noise_process`, `conditioning` and `network` decide what is
trained; `sources` and `references` lay out the batches; `averages` and `checkpoints` keep the weights; `sampling`,
`evaluation`, `training_log` and `hub_upload` show and share them; `run_folder` and `stop_signal` look after the run.
"""
