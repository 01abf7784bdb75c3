"""XMD, Qwen2-VL teaches Qwen2-Audio on VGGSound: both models' rows of the paper's Table 1, and Figure 3.

    python -m minixmd.train xmd_audio

First tools/prepare_vggsound.py and prepare_audioset.py write data/vggsound and data/audioset (README), and PANN's
Cnn14_16k_mAP=0.438.pth lies in models/. For other folders or checkpoints copy this file and pass them to `vggsound`.

One CUDA GPU of 24 GB or more; the paper had an L40 of 48 GB. Not measured by anybody yet. By --dry-run, for 149,460
clips to train on, on an H200 at 40 % of its peak: evaluating the models on every split 4 hours, labelling 9 (7 of them
by Qwen2-VL), the switch 0.3, distillation 2; at most 21 GiB, in evaluation. The report has the paper's figures.
"""
from minixmd.recipe_parts.xmd import vggsound

xmd = vggsound()
stages = xmd.before() + xmd.switch("audio") + xmd.distilled("audio") + xmd.report("audio")
