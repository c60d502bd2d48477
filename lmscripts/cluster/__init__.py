"""Where the processes run: the nodes of a cluster, what each of them has, and how it starts its part of a run.

Read by `scripts/launch.py` before anything heavy is imported, and by the processes that it starts: what it announced.
What the processes do once they have met stands in `training`; nothing here knows what is trained, and torch is
imported only by what runs as a node's own process, `agent`.
"""
