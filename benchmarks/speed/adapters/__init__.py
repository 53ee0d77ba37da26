"""One file a framework, at most 60 lines each; ``run(workload, feed, variant)`` trains and gives the final loss."""
