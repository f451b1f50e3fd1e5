"""The style sheet of the pages."""

from __future__ import annotations

from mixerzoo_search.report.palette import ACCENT, BAD, CARD, GOOD, INK, LINE, PAGE, SOFT

CSS = f"""
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%}}
body{{margin:0;background:{PAGE};color:{INK};font:15px/1.5 Inter,"Segoe UI","Helvetica Neue","Liberation Sans",
Arial,sans-serif;font-variant-numeric:tabular-nums}}
main{{max-width:1280px;margin:0 auto;padding:28px 24px 48px}}
header{{display:flex;flex-wrap:wrap;align-items:center;gap:6px 16px;margin-bottom:18px}}
h1{{font-size:26px;line-height:1.2;margin:0;letter-spacing:-.01em}}
header p{{margin:0;color:{SOFT};flex-basis:100%}}
.verdict{{border-radius:999px;padding:4px 14px;font-weight:600;font-size:14px;color:#fff;white-space:nowrap}}
.met{{background:{GOOD}}} .missed{{background:{BAD}}}
.figures{{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:14px;margin-bottom:18px}}
.figure,.card{{background:{CARD};border:1px solid {LINE};border-radius:12px;box-shadow:0 1px 2px rgba(27,36,48,.04)}}
.figure{{padding:14px 18px}}
.figure dt{{color:{SOFT};font-size:13px}}
.figure dd{{margin:2px 0 0;font-size:24px;font-weight:650;letter-spacing:-.01em;white-space:nowrap}}
.figure dd s{{text-decoration:none;color:{SOFT};font-weight:400;font-size:18px}}
.figure dd.note{{color:{SOFT};font-size:13px;font-weight:400;letter-spacing:0;white-space:normal}}
.card{{padding:18px 20px;margin-bottom:18px}}
h2{{font-size:17px;margin:0 0 2px}}
.card>p{{margin:0 0 10px;color:{SOFT};font-size:14px;max-width:150ch}}
.pair{{display:grid;grid-template-columns:1fr 1fr;gap:18px}}
.pair>.card{{min-width:0}}
@media(max-width:960px){{.pair{{grid-template-columns:1fr;gap:0}}.figures{{grid-template-columns:1fr 1fr}}
main{{padding:18px 14px 32px}}}}
.scroll{{overflow-x:auto}}
table.grid{{border-collapse:separate;border-spacing:2px;font-size:12px;width:100%}}
.grid th{{font-weight:500;color:{SOFT};padding:2px 4px;text-align:center;white-space:nowrap}}
.grid th.kind{{border-bottom:2px solid {LINE};font-weight:600;color:{INK};text-align:left;position:relative}}
.grid th.row{{text-align:left;color:{INK};font-weight:400}}
.grid th.row small{{color:{SOFT};display:block;line-height:1.1}}
.grid td{{padding:0;text-align:center;border-radius:4px;height:32px;min-width:27px;line-height:1.12}}
.grid td.n{{text-align:right;padding:0 6px;white-space:nowrap}}
.grid td b{{font-size:13px;font-weight:650;display:block}}
.grid td i{{font-style:normal;font-size:10px;display:block;opacity:.9}}
table.few{{width:auto}} .few td{{min-width:44px}} .few td.n{{min-width:76px}} .few th.row{{min-width:96px}}
.dense td{{min-width:16px}} .dense td i{{display:none}} .dense td b{{font-size:11px}} .dense .heat{{font-size:8px}}
.dense th{{padding:2px 1px;font-size:10px}} .dense th.row,.dense td.n{{font-size:12px}}
.grid td.gap,.grid th.gap{{min-width:8px;width:8px;padding:0}}
.grid tr.best td.n,.grid tr.best th.row{{font-weight:700}}
.grid tr.break td{{height:10px}}
.grid tr.over td{{height:18px}}
.grid tr.over div{{border-top:1px dashed {BAD};height:0;margin-top:9px}}
.grid tr.over span{{position:relative;top:-10px;background:{CARD};color:{BAD};padding:0 8px;font-size:11px}}
.heat{{font-size:11px}}
.legend{{display:flex;flex-wrap:wrap;gap:6px 18px;margin:12px 0 0;padding:0;list-style:none;font-size:13px}}
.legend b{{display:inline-block;width:24px;height:22px;line-height:22px;border-radius:4px;text-align:center;
margin-right:7px;font-weight:650}}
.bars{{display:grid;grid-template-columns:max-content 1fr max-content;gap:8px 12px;align-items:center}}
.bars div{{background:{PAGE};border-radius:4px;height:16px}}
.bars div i{{display:block;height:16px;border-radius:4px;background:{ACCENT};min-width:2px}}
.bars span:nth-child(3n){{text-align:right}}
.about{{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:3px 18px;margin:0;font-size:14px}}
.about dt{{color:{SOFT}}} .about dd{{margin:0;overflow-wrap:anywhere}}
pre{{background:{PAGE};border:1px solid {LINE};border-radius:8px;padding:10px 14px;margin:14px 0 0;font-size:13px;
white-space:pre-wrap;overflow-wrap:anywhere}}
.profile td.bar{{width:34%;min-width:180px}}
.profile td.bar div{{display:flex;align-items:center;gap:8px}}
.profile th{{width:7%;white-space:normal}} .profile th.row{{width:auto;white-space:nowrap}}
.profile td.bar i{{opacity:1;display:block;height:18px;border-radius:0 4px 4px 0;flex:none}}
"""
