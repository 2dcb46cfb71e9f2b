"""What a training step and a run will cost on TPUs or GPUs that one does not have.

estimate: bounds by arithmetic on a trace of the step, in seconds. compiled: the schedule that the real compiler makes, simulated.
"""
