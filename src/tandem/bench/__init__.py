"""`tandem bench`: do these devices compute what a CPU computes, and how fast?"""
