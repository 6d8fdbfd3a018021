"""Studies: what is compared (define), what it shows (judge), telling that (report), and making the runs (run).

Imports run one way: numbers, measure, evaluations, results, define, judge, report, run, open.
`evaluations` keeps what runs were asked, `results` reads what a study has left so far, `numbers` writes numbers;
`measure` says what cells are judged in; `open` is where commands come in.
"""
