"""The inference form: norms, sums and activations fused into the layers before, each layer run in its fastest way.

| file | what it does |
|---|---|
| `recipe` | the modules of the inference form that call the library, and the algebra of folding a norm |
| `rewrites` | passes over an eval graph: norms, sums, activations, constants and more move into layers |
| `decisions` | what was measured and chosen, and on what machine |
| `candidates` | times the candidates of each layer on its real shape, and puts the fastest in |
| `placing` | lets a layer write into the padded plane that the next one reads |
| `chaining` | packed layers that follow each other run in one call |
| `assemble`, `forms` | the parts of a model put together; the fastest form of the whole |
| `checking`, `locating`, `doubt` | compared with the model; where it differs first; what rounding explains |
| `hooks` | a model in which a hook changes something is refused |
| `stopwatch` | the one clock |
"""
