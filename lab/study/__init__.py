"""Studies: what is compared (define), making it (run), what it shows (judge), and telling that (report).

Imports run one way: define, results, judge, report, run.
"""
