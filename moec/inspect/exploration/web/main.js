// The tabs of the page, search and keys.
import {big,chunks,el,link,plural,table} from './elements.js';
import {$,D,LINE,MODULE,R,graphAt,irText,of,word} from './ops.js';
import {comparison} from './comparison.js';
import {G,close,graphView,jump,row} from './graph.js';
import {overview} from './overview.js';
import {fit,mountPanes,panes,zoom} from './panes.js';
import {routing} from './routing.js';
import {kernels,plan,weights} from './tables.js';

export const view=$('view');
const query=$('query');

// Search.
let texts=null;
function results(words){
  const f=G.f,steps=D.functions[f].steps,match=t=>words.every(w=>t.includes(w));
  texts??=new Array(D.ops.length);
  const found=step=>graphAt(f,step).flatMap((id,at)=>
    match(texts[id]??=`${irText(id)} ${word(id,MODULE)} ${word(id,LINE)}`.toLowerCase())?[at]:[]);
  let step=G.step,hits=found(step);
  while(!hits.length&&step>0)hits=found(--step);  // a pass may have replaced them
  if(!hits.length)step=G.step;
  const ids=graphAt(f,step),where=i=>steps.length>1?`${of} ${steps[i].name}`:'the last graph';
  const out=[el('h2',{},`${plural(hits.length,'op')} in ${D.functions[f].name}, ${where(step)}`)];
  if(step!==G.step)out.push(el('p',{},`None ${where(G.step)}.`));
  const list=el('div');
  chunks(list,hits.length,n=>{const r=row(f,step,hits[n]);r.onclick=()=>{query.value='';jump(f,step,hits[n])};
    r.lastChild.textContent=[word(ids[hits[n]],MODULE),word(ids[hits[n]],LINE).split(': `')[0]].filter(Boolean).join('  ·  ');return r});
  out.push(list);
  const whys=D.declined.filter(d=>match(`${d.where} ${d.rule} ${d.reason}`.toLowerCase()));
  if(whys.length)out.push(el('h2',{},`${whys.length} declined`),...whys.map(d=>el('div',{class:'card'},
    d.op===undefined?el('b',{},d.where):link(d.where||'the whole model',()=>{query.value='';jump(0,d.step,d.op)}),el('p',{},d.reason))));
  const stored=D.weights.filter(w=>match(`${w.name} ${w.kind} ${w.module} ${w.format}`.toLowerCase()));
  if(stored.length)out.push(el('h2',{},plural(stored.length,'weight')),table(['weight','of','module','format','stored as','#bytes'],stored,w=>[w.name,w.kind,w.module,w.format,w.stored,bytes(w.bytes)]));
  return out;
}
let waits=0;
query.addEventListener('input',()=>{cancelAnimationFrame(waits);waits=requestAnimationFrame(()=>show(tab))});

// Tabs and keys.
const TABS=D.comparison?[['comparison','Comparison',comparison],['graph','Graph',graphView]]:
  [['overview','Overview',overview],['graph','Graph',graphView],['kernels','Kernels',kernels],['weights','Weights',weights],
  ...(D.routing?[['routing','Routing',routing]]:[]),...(D.plan?[['plan','Plan',plan]]:[])];
let tab=TABS[0][0];
export function show(name){
  const words=query.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  if(name!==tab)scrollTo(0,0);
  tab=name;
  for(const b of $('tabs').children){
    const on=b.dataset.tab===name;
    b.setAttribute('aria-selected',on);
    b.tabIndex=on?0:-1;
  }
  view.replaceChildren(...(words.length?results(words):TABS.find(t=>t[0]===name)[2]()));
  mountPanes();
}
for(const[name,label]of TABS)$('tabs').append(el('button',{role:'tab',type:'button','data-tab':name,'aria-controls':'view',
  onclick:()=>{query.value='';close();show(name)}},label));
document.addEventListener('keydown',e=>{
  const at=document.activeElement,typing=/INPUT|SELECT/.test(at.tagName);
  if(e.key==='/'&&!typing){e.preventDefault();query.focus();query.select();return}
  if(e.key==='Escape'){if(query.value){query.value='';show(tab)}else close();return}
  if(at===query&&e.key!=='ArrowDown'||typing&&at!==query||e.ctrlKey||e.metaKey||e.altKey)return;
  if(/^[-+=0]$/.test(e.key)&&panes[0]?.element.isConnected){
    e.key==='0'?fit():zoom(e.key==='-'?1/1.2:1.2);
    e.preventDefault();return;
  }
  if(at.role==='tab'&&/^Arrow(Left|Right)$/.test(e.key)){
    const list=[...$('tabs').children],next=list[(list.indexOf(at)+(e.key==='ArrowRight'?1:list.length-1))%list.length];
    next.click();next.focus();e.preventDefault();return;
  }
  if(e.key==='ArrowDown'||e.key==='ArrowUp'){
    const list=[...view.querySelectorAll('[data-nav]')].filter(n=>n.offsetParent),i=list.indexOf(at);
    const next=i<0?list[0]:list[i+(e.key==='ArrowDown'?1:-1)];
    if(next&&(i>=0||at===query||at.role==='tab'||at===document.body)){next.focus();e.preventDefault()}
  }else if(e.key==='Enter'&&at.classList.contains('row')){at.click();e.preventDefault()}
  else if(at.dataset.group!==undefined&&/^Arrow(Left|Right)$/.test(e.key)){
    G.boxes.get(at.dataset.group).set(e.key==='ArrowRight');e.preventDefault();
  }else if(e.key==='ArrowLeft'&&at.classList.contains('row')){
    const box=[...G.boxes.values()].find(b=>b.head.nextSibling?.contains(at));
    if(box){box.head.focus();e.preventDefault()}
  }
});
matchMedia('(prefers-color-scheme:dark)').addEventListener('change',()=>show(tab));
$('title').textContent=D.title;
$('subtitle').textContent=D.comparison?'compared':[D.artifact?`artifact${R.target?` for ${R.target}`:''}`:'model',R.blocks.length?plural(R.blocks.length,'MoE block'):'no MoE block',
  R.parameters?`${big(R.parameters)} parameters`:''].filter(Boolean).join(', ');
show(tab);
