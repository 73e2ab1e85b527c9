"""The example scripts, which a wheel carries as `stf_diffusers.examples`: run one with `python -m`."""
