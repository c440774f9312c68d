"""`tandem bench`: does this device compute what a CPU computes, and how fast?"""
