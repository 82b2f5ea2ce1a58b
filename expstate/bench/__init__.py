"""The benchmark: take, restore and read beside the limits of the machine and beside other libraries, each in a fresh process.

``run`` gets the command line and plays the plan of ``plan``, ``child`` measures one step of it on the workload of ``state``, by ``systems``
or ``limits``; ``report`` hands on a table and JSON.
"""
