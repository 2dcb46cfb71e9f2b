"""What a step and a run will cost on hardware that is not at hand: by arithmetic at once, or from the TPU compiler's schedule.

chips, case: what is planned. trace: what the step does, counted from its own trace. estimate, search: what follows from that.
lower: the compiler. hlo, loops, comm, kernels, timing, walk: its schedule, read and timed. simulate: what follows from that.
show, asdict, timeline: for people, for programs, as a picture.
"""
