"""What a step and a run will cost on hardware that is not at hand: by arithmetic at once, from the TPU compiler's schedule if asked.

chips: what chips are. trace: what the step does, counted from its own trace. estimate: memory, bounds and the run, from that.
lower: the compiler. hlo, comm, cost, walk: its schedule, read and timed. search: meshes, remat, microbatches. show, timeline: out.
"""
