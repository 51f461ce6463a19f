// The first screen: what the model is, what moec did, and where time goes.
import {big,bytes,chunks,el,facts,link,percent,plural,table,time} from './elements.js';
import {D,MODULE,R,graphAt,word} from './ops.js';
import {jump,showBlock} from './graph.js';
import {show} from './main.js';
import {COLOURS,byKind,partOf,phases} from './tables.js';
import {loadMap} from './routing.js';

const port=p=>`${p.name}: ${p.dtype}[${p.shape.join(', ')}]`;
const spread=numbers=>{const a=Math.min(...numbers),b=Math.max(...numbers);return a===b?`${a}`:`${a} to ${b}`};
// Bars of parts, greatest first; what is small is one bar.
function bars(parts,total,write){
  const sorted=[...parts].sort((a,b)=>b[1]-a[1]),shown=sorted.slice(0,6),rest=sorted.slice(6).reduce((n,[,v])=>n+v,0);
  if(rest)shown.push([`${sorted.length-6} others`,rest]);
  const most=Math.max(...shown.map(s=>s[1]));
  return el('div',{class:'bars'},...shown.flatMap(([name,v])=>[el('span',{class:'name'},name),
    el('span',{class:'track'},el('i',{css:{width:`${100*v/most}%`}})),el('span',{class:'n'},`${write(v)}, ${percent(v/total)}`)]));
}
function gather(pairs){
  const parts=new Map();
  for(const[name,v]of pairs)parts.set(name,(parts.get(name)??0)+v);
  return parts;
}
function whatItIs(){
  const f=D.functions[0],modules=graphAt(0,f.steps.length-1).map(id=>word(id,MODULE).split(' ')[0]);
  const layers=new Set(modules.map(m=>/^(.*?(?:^|\.)\d+)(?:\.|$)/.exec(m)?.[1]).filter(Boolean)).size,B=R.blocks;
  const kinds=byKind(),total=D.weights.reduce((n,w)=>n+w.bytes,0);
  return el('section',{},el('h2',{},'What the model is'),
    facts([['type',`${B.length?'mixture of experts':'no MoE block was recognised'}${R.text?', continues text':''}`],
      ['layers',layers?`${layers}${B.length?`, ${B.length===layers?'all':B.length} with experts`:''}`:''],
      ['experts',B.length?`${spread(B.map(b=>b.experts))} a layer, ${spread(B.map(b=>b.top_k))} per token${B.some(b=>b.shared)?', and a shared branch':''}`:''],
      ['parameters',R.parameters?`${big(R.parameters)}, ${big(R.active_parameters)} active per token (${percent(R.active_parameters/R.parameters)})`:''],
      ['weights',Object.entries(R.bytes_by_dtype).map(([k,n])=>`${bytes(n)} ${k}`).join(' + ')+(R.bytes_out===null?'':`, ${bytes(R.bytes_out)} packed`)],
      ['inputs',R.inputs.map(port).join(', ')],['outputs',R.outputs.map(port).join(', ')],
      ['sizes',Object.entries(R.sizes).map(([k,[a,b]])=>`${k} ${a} to ${b??'any'}`).join(', ')],['text',R.text]]),
    ...(total?[el('div',{class:'bar','aria-hidden':'true'},...kinds.map(([,v],i)=>el('i',{css:{width:`${100*v.bytes/total}%`,background:COLOURS[i%COLOURS.length]}}))),
      el('div',{},...kinds.map(([k,v],i)=>el('span',{class:'key small'},el('i',{css:{background:COLOURS[i%COLOURS.length]}}),`${k} ${bytes(v.bytes)}, ${[...v.formats.keys()].join(', ')}`)))]:[]));
}
function whatMoecDid(){
  const steps=D.functions[0].steps,did=R.passes.filter(p=>p.rewrites),B=R.blocks,V=R.verification;
  const last=steps.at(-1).ops,first=steps.length>1?steps[0].ops:R.passes.length?R.passes[0].ops:last;
  const wrong=V.filter(v=>v.error===null||v.error>v.tolerance).length;
  return el('section',{},el('h2',{},'What moec did'),
    facts([['passes',R.passes.length?[link(`${did.length} of ${R.passes.length} changed the graph`,()=>show('graph')),`: ${first} ops became ${last}`]:''],
      ['recognised',B.length?`${plural(B.length,'MoE block')}: ${[...new Set(B.map(b=>`${b.router}; ${b.activation}`))].join(' · ')}`:'no MoE block'],
      ['proof',B.length?'each block and what replaced it had the same results on random routings':''],
      ['declined',D.declined.length?plural(D.declined.length,'candidate')+', see below':'none'],
      ['verified',R.verified==='quick'?'quick: the graph and the weights, without running the code':V.length?`${R.verified==='layers'?'layer by layer':'the whole model'} against eager: ${wrong?`${plural(wrong,'output')} beyond the tolerance, each kernel is right: see the note`:
        `error of ${V[0].output} ${V[0].error.toExponential(1)}, ${V[0].tolerance.toExponential(0)} allowed`}`:'no: the code was not compared with eager'],
      ['kernels',R.checked_kernels],
      ['calls',Object.entries(R.kernels).map(([k,n])=>`${n} x ${k}`).join(', ')],
      ['quantised',R.quantised.length?[...new Set(R.quantised.map(q=>q.format))].join(', '):'']]));
}
function whereTimeGoes(){
  const out=[];
  for(const p of [...phases].reverse()){
    const calls=D.calls.filter(c=>c.function===p.function),sizes=Object.entries(p.sizes).map(s=>s.join('=')).join(', ');
    const parts=gather(calls.map(c=>[partOf(c.module),p.kernels[c.call].time.seconds]));
    parts.set('(between kernels)',p.between+p.outside);
    out.push(el('h3',{},`${p.name}: ${time(p.call)} a call (${sizes})`),bars(parts,p.call,time));
  }
  if(!phases.length&&D.weights.length){
    // What a token reads: of a block's experts the share that it is routed to.
    const share=w=>{const b=w.kind==='experts'&&R.blocks.find(x=>`${w.module}.`.startsWith(`${x.name}.`));return w.kind==='embeddings'?0:b?b.top_k/b.experts:1};
    const parts=gather(D.weights.map(w=>[partOf(w.module)||w.kind,w.bytes*share(w)]).filter(p=>p[1])),total=[...parts.values()].reduce((a,b)=>a+b,0);
    out.push(el('h3',{},`No times: weights read for one token, at most ${bytes(Math.round(total))}`),bars(parts,total,n=>bytes(Math.round(n))),
      el('p',{class:'soft small'},D.artifact?'Times: moec profile ARTIFACT --json > profile.json, then --profile profile.json.':'Times are those of an artifact: compile the model, then moec profile.'));
  }
  return el('section',{},el('h2',{},'Where time goes'),...out);
}
export function overview(){
  const out=[el('div',{class:'first'},whatItIs(),whatMoecDid(),whereTimeGoes())];
  if(D.routing)out.push(loadMap());
  if(D.declined.length)out.push(el('h2',{},`Declined (${D.declined.length})`));
  const cards=el('div');
  chunks(cards,D.declined.length,i=>{
    const d=D.declined[i],go=d.op===undefined?null:()=>jump(0,d.step,d.op);
    return el('div',{class:'card'},el('div',{},go?link(d.where||'the whole model',go):el('b',{},d.where||'the whole model'),
      el('span',{class:'soft'},`  ${d.rule}`)),el('p',{},d.reason),d.line?el('code',{},d.line):null);
  });
  out.push(cards);
  if(R.blocks.length)out.push(el('h2',{},`Recognised (${plural(R.blocks.length,'MoE block')})`),
    table(['block','experts','router','activation','written as','#parameters',...(D.calls.length?['kernels']:[])],R.blocks,b=>[
      link(b.name,()=>showBlock(b.name)),`${b.top_k} of ${b.experts}${b.zero?`, ${b.zero}`:''}${b.shared?' + shared':''}`,
      b.router,b.activation,b.form,big(b.parameters),...(D.calls.length?[b.kernel]:[])]));
  if(R.verification.length)out.push(el('h2',{},'Compared with eager'),table(['output','#greatest error','#allowed',''],R.verification,v=>[
    v.output,v.error===null?'not finite':v.error.toExponential(1),v.tolerance.toExponential(0),v.error!==null&&v.error<=v.tolerance?'ok':'ok, each kernel is: see the note']));
  if(R.choices.length)out.push(el('h2',{},'Chosen by moec optimize'),el('p',{class:'soft'},'Damage is predicted, or of a layer measured alone; the notes have limits and sums.'),
    table(['of','choice','#bytes saved','#damage','#share of dropped experts'],R.choices,c=>[c.name,c.choice,bytes(c.bytes_saved),c.damage.toPrecision(3),c.share===null?'':percent(c.share)]));
  if(R.quantised.length)out.push(el('h2',{},'Quantised'),table(['weights','format','#error','#worst','#before','#after'],R.quantised,q=>[
    q.name,q.format,percent(q.error),percent(q.worst),bytes(q.bytes_before),bytes(q.bytes_after)]));
  if(R.loops.length)out.push(el('h2',{},'Plain loops although their kind has kernels'),table(['where','op','why'],R.loops,l=>[l.where,l.op,l.reason]));
  if(R.notes.length)out.push(el('h2',{},'Notes'),el('ul',{},...R.notes.map(n=>el('li',{},n))));
  return out;
}
