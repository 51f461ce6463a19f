// Kernels, weights and a plan.
import {big,bytes,chunks,el,facts,link,meter,percent,plural,table,time} from './elements.js';
import {D,INPUTS,NAME,T,graphAt,namesOf,op,word} from './ops.js';
import {jump} from './graph.js';
import {heatMap} from './heatmap.js';
import {show} from './main.js';

export const phases=D.profile?D.profile.phases:[];
export function callText(c){
  const parts=[`call ${c.call} of ${c.function}`];
  for(const p of phases)if(p.function===c.function)parts.push(`${p.kernels[c.call].kernel}: ${time(p.kernels[c.call].time.seconds)} in ${p.name}`);
  return parts.join('; ');
}
// The part of a model that a module is: its name below the layer, without numbers.
export function partOf(module){
  const[path]=module.split(' '),names=path.split('.'),at=names.findIndex(n=>/^\d+$/.test(n));
  return(at<0?names.at(-1):names[at+1]??'layer')||'(no module)';
}
const K={at:0,sorted:true};
export function kernels(){
  if(!D.calls.length)return[el('p',{},D.artifact?'The artifact lists no calls of kernels: it is for a GPU, or of an older moec.':
    'No code was generated for this model. Compile it and explore the artifact to see its kernels.')];
  const names=[...new Set(D.calls.map(c=>c.function))],phase=phases[K.at];
  const calls=D.calls.filter(c=>c.function===(phase?phase.function:names[K.at])),tools=el('div',{class:'tools'});
  const choices=phase?phases.map(p=>`${p.name} (${Object.entries(p.sizes).map(s=>s.join('=')).join(', ')})`):names;
  tools.append(el('label',{},phase?'Phase ':'Function ',el('select',{onchange:e=>{K.at=+e.target.value;show('kernels')}},
    ...choices.map((c,i)=>el('option',{value:i,selected:i===K.at},c)))));
  const f=D.functions.findIndex(x=>x.name===calls[0].function),last=D.functions[f].steps.length-1,ids=graphAt(f,last);
  const ops=c=>c.ops.length?link(c.ops.map(at=>word(ids[at],NAME)).join(', '),()=>jump(f,last,c.ops[0])):'(prepares operands)';
  if(!phase)return[tools,el('p',{class:'soft'},'Times come from a profile: moec profile ARTIFACT --json > profile.json, then --profile profile.json.'),
    table(['#call','ops','module','line'],calls,c=>[c.call,ops(c),c.module,c.line])];
  const seconds=c=>phase.kernels[c.call].time.seconds,kinds=new Map();
  tools.append(el('label',{},el('input',{type:'checkbox',checked:K.sorted,onchange:e=>{K.sorted=e.target.checked;show('kernels')}}),' slowest first'));
  for(const c of calls){
    const k=phase.kernels[c.call].kernel,sum=kinds.get(k)??[0,0];
    kinds.set(k,[sum[0]+1,sum[1]+seconds(c)]);
  }
  const rows=K.sorted?[...calls].sort((a,b)=>seconds(b)-seconds(a)):calls;
  return[tools,el('p',{class:'soft'},`${time(phase.call)} a call on ${D.profile.machine}, ${plural(D.profile.threads,'thread')}; `+
      `between kernels ${time(phase.between)}, outside of the library ${time(phase.outside)}.`),
    timeMap(calls,seconds),el('h2',{},'By kind'),table(['kernel','#calls','#time','#share',''],[...kinds].sort((a,b)=>b[1][1]-a[1][1]),([k,[n,s]])=>[k,n,time(s),percent(s/phase.call),meter(s/phase.call)]),
    el('h2',{},'Calls'),table(['kernel','#time','#share','#roofline','#FLOPs','#bytes','ops','module','line'],rows,c=>{
      const k=phase.kernels[c.call],s=k.time.seconds;
      return[k.kernel,time(s),percent(s/phase.call),k.least===null?'':percent(k.least/s),(k.at_most?'<= ':'')+big(k.flops),big(k.bytes),ops(c),c.module,c.line]})];
}
// Time by layer and part.
function timeMap(calls,seconds){
  const layers=[],parts=[],sums=new Map();
  for(const c of calls){
    const layer=/(?:^|\.)(\d+)(?:\.|$)/.exec(c.module.split(' ')[0])?.[1];
    if(layer===undefined)continue;
    const part=partOf(c.module),key=`${layer} ${part}`;
    if(!layers.includes(layer))layers.push(layer);
    if(!parts.includes(part))parts.push(part);
    sums.set(key,(sums.get(key)??0)+seconds(c));
  }
  if(!layers.length)return'';
  const value=(x,y)=>sums.get(`${layers[y]} ${parts[x]}`)??0,us=s=>(1e6*s).toFixed(1);
  return heatMap({title:'Time by layer and part',columns:parts,rows:layers,columnTitle:'part',rowTitle:'layer',value,most:Math.max(...sums.values()),
    show:us,unit:'us',tell:(x,y)=>`layer ${layers[y]}, ${parts[x]}: ${time(value(x,y))}`});
}

// Weights.
export const COLOURS=['#3b6fb6','#2a8a63','#b07a1e','#a33f6f','#6d5bb0','#4a8fa3','#8a8f98'];
// [kind, {bytes, formats}] of weights, greatest first.
export function byKind(){
  const kinds=new Map();
  for(const w of D.weights){
    if(!kinds.has(w.kind))kinds.set(w.kind,{bytes:0,formats:new Map()});
    const k=kinds.get(w.kind);
    k.bytes+=w.bytes;k.formats.set(w.format,(k.formats.get(w.format)??0)+w.bytes);
  }
  return[...kinds].sort((a,b)=>b[1].bytes-a[1].bytes);
}
let kindShown='';
export function weights(){
  const sorted=byKind(),total=D.weights.reduce((n,w)=>n+w.bytes,0)||1;
  const colour=i=>COLOURS[i%COLOURS.length],toggle=k=>{kindShown=kindShown===k?'':k;show('weights')};
  const shown=D.weights.filter(w=>!kindShown||w.kind===kindShown);
  const last=D.functions[0].steps.length-1;
  const readers=new Map(graphAt(0,last).flatMap((id,at)=>op(id)[INPUTS].map(i=>[T[i],at])).reverse()); // the first of each
  const reader=w=>{const at=namesOf(w).map(n=>readers.get(n)).find(n=>n!==undefined);return at===undefined?w.module:link(w.module||'its reader',()=>jump(0,last,at))};
  return[el('p',{},`${bytes(total)} in ${plural(D.weights.length,'array')}`+(D.artifact?', as packed for the kernels.':', before code generation packs them.')),
    el('div',{class:'bar','aria-hidden':'true'},...sorted.map(([k,v],i)=>el('i',{title:`${k}: ${bytes(v.bytes)}`,css:{width:percent(v.bytes/total).replace(' ',''),background:colour(i)}}))),
    el('div',{},...sorted.map(([k,v],i)=>el('button',{class:'key',type:'button','aria-pressed':String(k===kindShown),onclick:()=>toggle(k)},
      el('i',{css:{background:colour(i)}}),el('span',{},`${k}: ${bytes(v.bytes)}, ${percent(v.bytes/total)}, ${[...v.formats.keys()].join(', ')}`)))),
    el('h2',{},kindShown?`Weights of ${kindShown}`:'All weights'),
    table(['weight','of','module','format','stored as','#bytes','#share',''],shown,w=>[w.name,w.kind,reader(w),w.format,w.stored,bytes(w.bytes),percent(w.bytes/total),meter(w.bytes/shown[0].bytes)])];
}

// A plan.
export function plan(){
  const p=D.plan,ms=s=>`${(1e3*s).toFixed(3)} ms`;
  return[facts([['model',p.model],['cluster',`${p.cluster}, ${plural(p.devices,'device')}`],['phase',`${p.workload.phase}, ${plural(p.workload.tokens,'token')} a step`],
    ['routing',p.routing],['step',`${ms(p.seconds)} (predicted)`],['memory',`${bytes(p.memory)} of ${bytes(p.memory_limit)} a device`]]),
    table(['#layer','attention','experts','exchange','#slots','#busiest / mean','#layer time'],p.layers,l=>[l.layer,`TP ${l.attention}`,
      l.experts?`EP ${l.ranks}${l.slices>1?` x slice ${l.slices}`:''}${l.copies>1?` x DP ${l.copies}`:''}`:'dense',l.experts?l.form:'',
      l.experts?l.slots.reduce((n,s)=>n+s.length,0):'',l.experts?l.imbalance.toFixed(2):'',ms(l.total)])];
}
