"""Published figures that stage Report shows beside ours, or apart from them: accuracies in %.

Rows and columns are looked up by their titles, those of xmd.py and sightsound.py. A figure stands beside ours only
where both are the paper's (BESIDE, and report_sightsound.py for benchmarks); all of them stand at the page's end.
"""


def _rows(columns, lines):
    """{row: {column: figure}} of lines such as "Qwen2-Audio 64.3 52.6 -", in which "-" is none."""
    rows = [line.strip().rsplit(maxsplit=len(columns)) for line in lines.strip().split("\n")]
    return {name: {column: float(figure) for column, figure in zip(columns, figures, strict=True) if figure != "-"}
            for name, *figures in rows}


ONE, TWO = "Table 1, and the unseen classes", "Table 2: Qwen2-VL teaches Qwen2-Audio"
XMD = {
    "source": "Nothing here was measured by this run. Jiang, Wu, Choudhari and Mesgarani, Bridging Ears and Eyes: "
              "Tables 1 and 2, the caption of Figure 1, sections 3.2, 4.2 and 4.3. VGGSound, 286 classes; unseen: "
              "AudioSet evaluation set. Accuracies in %.",
    "tables": {
        ONE: _rows(("analysis", "test", "unseen"), """
            Qwen2-Audio-7B-Instruct              71.9 69.0 60.0
            Qwen2-Audio distilled from Qwen2-VL  92.6 89.4 72.3
            Qwen-Audio-Chat (7B)                 63.2 60.4    -
            Kimi-Audio-7B-Instruct               70.6 66.7    -
            Qwen2-VL-7B-Instruct                 88.5 80.8    -
            Qwen2-VL distilled from Qwen2-Audio  91.4 83.9    -
            Qwen2.5-VL-7B-Instruct               88.8 81.0    -
            VideoLLaMA 3                         83.4 76.4    -
            Qwen2.5-Omni                         92.6 89.7    -
        """),
        TWO: _rows(("analysis", "test"), """
            KL on teacher's logits                        92.1 88.7
            KL on teacher's logits + labels               92.3 88.9
            Ground-truth labels (upper bound)             96.4 92.8
            Teacher's labels (default)                    92.6 89.4
            Teacher's labels without anti-forgetting loss 92.5 89.1
        """),
        "Averages over the 30 classes of Figure 1, people included": _rows(("50 clips a class",), """
            Qwen2.5-Omni        94.4
            Human ears and eyes 84.2
            Qwen2-VL            83.9
            Human eyes          74.1
            Qwen2-Audio         72.5
            Human ears          71.9
        """),
    },
    "classes": {"won": 226, "of": 286},  # by Qwen2-VL over Qwen2-Audio; the other 60 hold the ties
    "switch": {"validation": 88.8, "training": 89.1},
}

AVQA, MMAU, MUSIC = "Table 1: AVQA validation", "Table 2: MMAU test-mini v05.15.25", "Table 2: MUSIC-AVQA test"
TASKS = ("Sound", "Speech", "Music", "Average")  # of MMAU
MMAU_VERSION = "v05.15.25"  # of the paper
SIGHTSOUND = {
    "source": "Nothing here was measured by this run. Wang, Jiang, He, Wu and Mesgarani, SightSound-R1: Tables 1 and "
              "2. Qwen2-Audio-7B-Instruct, taught by Qwen2.5-VL-32B-Instruct and checked by GPT-4o-audio; "
              "Audio-Thinker as quoted there. Accuracies in %.",
    "columns": {  # what is to be said where one of this title is shown
        "avqa": "AVQA's validation split, the set of the paper's Table 1, is also the one by which the best weights of "
                "SFT and GRPO are chosen, in the paper as in recipe sightsound: for trained rows it is no held-out "
                "set.",
    },
    "notes": [
        "The paper does not say, and recipe sightsound chooses: n = 8 traces a clip, sampled at temperature 1; at most "
        "512 new tokens; epsilon 0.2; LoRA on every projection of the decoder; full-parameter as all of the decoder; "
        "weight decay 0, warm-up of 5 % of the steps, gradients clipped at 1; one frame a second; the prompts; how the "
        "option most similar to an answer is found. Read from its GPU counts: 64 sequences an SFT step, 24 prompts a "
        "GRPO step.",
        "MUSIC-AVQA: the paper's 7k questions are read as the 6,707 of the test split that are not on pictures alone, "
        "and its average as the one over those, Location included, for which it has no column. The options offered "
        "are the training file's answers to the same type of question.",
    ],
    "tables": {
        AVQA: _rows(("avqa",), """
            Qwen2.5-Omni-3B (audio), direct                     73.6
            Qwen2.5-Omni-7B (audio), direct                     74.7
            Qwen2-Audio-7B-Instruct, direct                     67.1
            Qwen2-Audio-7B-Instruct, zero-shot CoT              57.7
            Qwen2-Audio-7B-Instruct, test-time CoT distillation 82.7
            Qwen2-Audio-7B-Instruct, SFT (ground truth)         86.5
            Qwen2.5-Omni-3B (video), direct                     86.5
            Qwen2.5-Omni-7B (video), direct                     87.4
            Qwen2.5-VL-7B-Instruct, direct                      85.7
            Qwen2.5-VL-32B-Instruct, direct                     85.8
            Qwen2.5-VL-32B-Instruct, zero-shot CoT              84.6
            Qwen2.5-VL-32B-Instruct, zero-shot audio CoT        85.5
            Qwen2.5-Omni-3B, direct                             88.5
            Qwen2.5-Omni-7B, direct                             89.5
        """),
        MMAU: _rows(TASKS, """
            Direct inference                         64.3 52.6 61.7 59.5
            SFT (ground-truth labels)                66.7 50.8 61.1 59.5
            SFT (distilled labels)                   64.3 52.3 60.5 59.0
            GRPO (distilled labels)                  62.5 49.8 59.3 57.2
            Audio-Thinker, SFT (ground-truth CoT)    63.4 56.3 54.4 57.8
            Audio-Thinker, GRPO (ground-truth CoT)   70.3 61.6 63.2 65.0
            SFT                                      61.3 47.1 48.5 52.3
            AGFV + SFT                               63.1 47.7 51.5 54.1
            TTS + AGFV + SFT                         61.6 48.3 50.6 53.5
            TTS + AGFV + SFT + GRPO                  66.1 49.8 52.7 56.2
        """),
        MUSIC: _rows(("Temporal", "Comparative", "Counting", "Existential", "Average"), """
            Direct inference          57.2 57.8 55.7 55.1 55.6
            SFT (ground-truth labels) 60.4 62.7 61.1 60.7 61.1
            SFT (distilled labels)    59.5 61.4 59.1 60.2 58.8
            GRPO (distilled labels)   59.3 60.8 59.1 60.3 58.8
            SFT                       56.7 57.7 56.5 54.3 55.1
            AGFV + SFT                58.2 59.4 56.9 56.5 56.5
            TTS + AGFV + SFT          60.6 59.0 59.1 57.5 58.2
            TTS + AGFV + SFT + GRPO   62.7 63.3 60.1 59.7 59.5
        """),
    },
    "others": {  # each title says of which version, and where it stands
        "MMAU test-mini v05.15.25, the benchmark's leaderboard (Sakshi113/mmau_homepage, leaderboard_data_v15_parsed; "
        "Omni-R1: leaderboard_data_v15)": _rows((*TASKS, "average of the test set"), """
            Qwen2-Audio-Instruct    67.27 55.26 56.29 59.60 57.40
            Qwen2.5-Omni (8.2B)     78.10 70.60 65.90 71.50 71.00
            Kimi-Audio              75.68 62.16 66.77 68.20 64.40
            Audio Reasoner          67.87 66.07 69.16 67.70 63.78
            Audio Flamingo 3        79.58 66.37 73.95 73.30 72.42
            Audio Flamingo 2 (3B)   71.47 44.74 70.96 62.40 61.06
            Omni-R1                 81.7  76.0  73.4  77.0  75.0
            Audio-Thinker (8.4B)    81.98 76.88 74.25 77.7  75.98
            MiMo-Audio 7B           81.68 68.17 74.25 74.7  72.59
            Step-Audio-2            -     -     -     77.58 73.86
            Step-Audio-2-mini       -     -     -     72.73 70.23
            Phi-4-multimodal        -     -     -     65.70 62.81
            DeSTA2.5-Audio          -     -     -     66.00 65.21
            SALMONN (13B)           -     -     -     34.90 36.23
            GAMA                    -     -     -     20.82 21.68
            GPT-4o Audio            -     -     -     62.50 60.82
            Gemini 2.5 Flash        -     -     -     71.80 67.39
            Gemini 2.5 Pro          -     -     -     71.60 69.36
        """),
        "MMAU test-mini before v05.15.25, which is other questions (leaderboard_data of the same; R1-AQA's own table; "
        "Omni-R1's paper)": _rows((*TASKS, "average of the test set"), """
            Random guess                              -     -     -     26.00 -
            Most frequent choice                      -     -     -     25.50 -
            Human                                     -     -     -     82.23 -
            Qwen2-Audio-Instruct                      54.95 42.04 50.98 49.20 52.50
            Qwen-Audio-Chat                           55.25 30.03 44.00 43.10 -
            Qwen2-Audio (base)                        -     -     -     5.24  -
            Audio Flamingo 2                          -     -     -     55.48 -
            R1-AQA, its paper                         69.37 57.36 66.77 64.50 -
            R1-AQA, the leaderboard                   68.77 63.66 64.37 65.60 64.36
            Qwen2-Audio, zero-shot CoT (R1-AQA)       -     -     -     57.80 -
            Qwen2-Audio, Audio-Reasoner CoTA (R1-AQA) -     -     -     61.71 -
            Qwen2.5-Omni (Omni-R1)                    -     -     -     65.9  68.4
            Qwen2.5-Omni, GRPO on AVQA (Omni-R1)      -     -     -     68.6  70.8
        """),
        "AVQA-R1-6K, 1,911 questions on a picture and a sound (EchoInk-R1's README)": _rows(("validation",), """
            Qwen2.5-Omni-7B 80.53
            EchoInk-R1      85.77
        """),
    },
}
PAPERS = {"xmd": XMD, "sightsound": SIGHTSOUND}
BESIDE = {  # Report's published -> what is looked up beside its tables, and beside its ablation
    None: ({}, {}),
    "xmd": (XMD["tables"][ONE], XMD["tables"][TWO]),
    "sightsound": (SIGHTSOUND["tables"][AVQA],) * 2,
}
BENCHMARKS = {"mmau": SIGHTSOUND["tables"][MMAU], "music_avqa": SIGHTSOUND["tables"][MUSIC]}  # columns and benchmarks
