"""A page that shows a pruned model beside the dense one, from the same noise: `python -m diffusers_gfprune.demo runs/x`.

`models` loads both, `drawing` samples them with stock pipelines, `page` is the page. Needs the extra `demo`.
"""
