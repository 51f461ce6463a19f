"""From an example to a graph, and to the sizes at which it computes what its module does.

wish     which axes of the inputs vary, and their names          wishes
widen    the lengths at which the module is exported             widen, axis_groups, axis_search
export   torch records its conditions on sizes, the guards       guards, guard_text
settle   each guard is implied, a bound, harmless, or refused    settle, false_sizes, conditions
merge    exports of both sides of a branch become one            sides, merge, merged_size
after    sizes of 0 and 1, axes and parts that are fixed         least_sizes, fixed_axes,
                                                                 constant_sizes

Whether module and graph agree at some sizes is asked of `moec.oracle`.
"""
