"""The base configuration: every field a study may set, with its default. Studies edit it; see configs/."""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """A fresh, locked config: unknown fields and wrong types are refused."""
    config = ConfigDict(
        dict(
            seed=0,  # of the order and layout of texts: batches depend on it and the step alone
            model_seed=0,  # of the weights
            study=dict(
                name="",
                question="",
                cells=(),  # made by lab.study.define.cells: product, chain, zipped, named
                labels=(),  # ((field, short label), ...) for columns and axes, in the order tables use
                condition="eval_branch",  # the label of what cells are evaluated under
                groups=(),  # ((title, (value of a label, ...)), ...): panels of the learning curves, by what they show
                sections=("curves",),  # names, or (name, label, ...): lab.study.report.sections
                published="",  # a csv of published numbers, relative to the repository
                seeds=1,
                length="steps",  # steps | tokens | flops: what cells train alike, by train.steps of each
                judged=(),  # values of the condition whose mean loss judges a cell; empty: all
                baseline=(),  # ((label, value), ...): cells are compared with the one that has these instead of theirs
                contrasts=(),  # ((name, plus, minus) or (name, a, b, c, d), ...): see lab.study.define.contrasts
                hypotheses=(),  # ((claim, ((single | crossed | aligned, name of a contrast, -1 | 1), ...)), ...)
                tune=(),  # ((field, values), ...): each cell is tuned on this grid first
                tune_seed=1000,  # of the trials; cells are judged on seed, seed + 1, ...
                vmap="none",  # none | seeds | numbers: runs of one program are trained as one vmapped program
            ),
            model=dict(
                dim=96,
                layers=3,
                heads=4,
                kv_heads=1,
                head_dim=24,  # of queries and keys
                v_head_dim=0,  # of values; 0: head_dim
                ffn=256,
                vocabulary=258,
                tied=True,
                norm_eps=1e-5,
                pattern=((),),  # layer specs that repeat; each a tuple of (model field, value) laid over these
                mixer="attention",  # names of lab.model.mixers
                latent=0,  # numbers of a latent of mla; 0: none, as others have it
                latent_norm=True,  # RMSNorm of the latents of mla and s3
                q_rank=0,  # of a low-rank query projection; 0: full
                o_rank=0,  # of a low-rank output projection; 0: full
                rotate="auto",  # which of q, k, v, o rotate, as in "qkvo"; or none; auto: what the mixer means
                softmax_scale=0.0,  # 0: head_dim^-1/2
                output_gate=False,
                sink=False,
                qk_norm=False,
                stream=dict(
                    name="plain",  # names of lab.model.streams
                    accumulate="raw",  # raw | post: what v1 sums, outputs of sublayers or the stream after them
                    input="raw",  # raw | normed: what of a layer's input the weights of tokens are inferred from
                    length=0,  # tokens of a row at most, for streams with a number for each position
                    copies=0,  # of the stream, for hyper-connections
                    rank=0,  # of what laurel adds to the residual
                    blocks=0,  # that attnres-block sums layers into
                ),
                rule="all_branches",  # names of lab.kernels.rules joined by &
                implementation="auto",  # auto | tiled | reference | pallas_tpu | pallas_gpu | pallas_triton
                softcap=0.0,
                position="rope2d",  # rope2d | fourier
                rotary=dict(
                    theta=1e6,
                    ratio=1.0,
                    stride=128,
                    unselected="index",  # index | time
                    dim=0,  # dimensions at the end of a head that rotate; 0: all
                    table="own",  # own: frequencies of a head of that many; head: the fastest of the whole head's
                ),
                compute="float32",  # float32 | bfloat16; weights stay float32
                scan=False,  # lax.scan over layers: fast to compile; unrolled: fast on a CPU
                remat="none",  # none | dots | full
            ),
            data=dict(
                corpus="stdlib",  # stdlib | files | jsonl | parquet | huggingface; or a probe of lab.data.probes
                path="",  # globs joined by commas, or a dataset's name
                field="text",  # of a JSON line, a parquet column, a dataset
                tokenizer="bytes",  # bytes | bpe:<size> | the path of a tokenizer.json
                text_length=32,  # tokens of a text at most
                long_texts="split",  # split | truncate | refuse
                texts=0,  # training texts: the first so many, 0 = all
                texts_per_row=16,
                rows=4,  # of a training step, over all devices and hosts
                draw="1-15",  # branches of a group: fixedN or LOW-HIGH
                stagger=True,
                align="left",  # left | right
                slots=0,  # 0: branches take slots 1, 2, ...; S: a random subset of 1..S
                prompt="none",  # none | first: the first text of a group is its shared prompt
                workers=0,  # processes that pack batches; 0 packs in threads
                probe=dict(
                    difficulty="2-8",  # of training rows: fixedN or LOW-HIGH (pairs, symbols, moves or tokens)
                    symbols=32,  # in the alphabet
                    objects=5,  # that the permutations of state tracking move: 5 is S5, 2 parity
                ),
            ),
            train=dict(
                steps=250,
                microbatches=1,
                optimizer="adamw",  # adamw | muon
                schedule="cosine",  # constant | cosine | linear | wsd
                learning_rate=3e-3,
                final_learning_rate=3e-4,
                warmup=30,
                cooldown=0.2,  # share of the steps that wsd spends cooling down
                b1=0.9,
                b2=0.95,
                eps=1e-8,
                weight_decay=0.01,
                decay="declared",  # declared: not norms, biases, scales; all: everything
                clip=1.0,  # of the global gradient norm
                z_loss=0.0,
                muon=dict(  # on matrices, at learning_rate and weight_decay; AdamW on embeddings, norms and biases
                    momentum=0.95,
                    scaling="moonlight",  # of updates by shape: moonlight | keller-jordan | mup
                    steps="5",  # of Newton-Schulz: 5 | 8+2
                    per_head="none",  # weights whose heads are matrices of their own: none | qkv | all (W_O too)
                    on=(),  # names of the matrices that it takes, as q, o, gate; empty: all
                    adam_rate=1.0,  # AdamW's learning rate, in units of learning_rate
                    adam_decay=0.01,  # AdamW's weight decay
                ),
            ),
            evaluate=dict(
                branches=(1, 2, 4, 8, 16, 24, 32, 48, 64),
                difficulties=(2, 4, 8),  # of probes, which have no branches
                texts=768,  # a multiple of texts_per_row
                texts_per_row=192,  # lcm of the branch counts, so that every count fills its groups
                rows=2,  # of one call, over all devices and hosts
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1, context=1),  # -1: what is left of the devices
            checkpoint=dict(every=100, keep=2),
            log=dict(every=10),
        )
    )
    return config.lock()


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Every field by its dotted name."""
    found = {}
    for name, value in config.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {f"{prefix}{name}": value}
    return found


def set_field(config: ConfigDict, name: str, value) -> None:
    """Sets a field by its dotted name."""
    *path, last = name.split(".")
    for part in path:
        config = config[part]
    config[last] = value
